"""What the CAM pseudo-labels of a run are worth: the analysis figures of the CoSA paper."""
