"""Inversion: real images to bank rows, one module a method.

method.py     what a method is
methods.py    the configured ones
run.py        images and methods to a bank, and what that takes
encode.py     the image's own latent
ddim.py       the latent that the sampler makes the image from
embedding.py  the conditioning that the model makes such images from
score.py      the judge's opinion of what a row gives back
"""
