"""Slow, obvious versions of the library's formulas, for the tests only.

Everything here is written from the method's equations with plain Python loops over images,
pixels and classes. Nothing is imported from ``wsss``, so a shared mistake is unlikely. Torch
appears only for scalars and small vectors, so that autograd gives the reference gradient.
"""
