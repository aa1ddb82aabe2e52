# SPDX-License-Identifier: Apache-2.0
"""Seeing what a network does: cost, interaction range, receptive fields, feature maps, EigenCAM, attention.

Arrays come first (dictionaries for `numpy.savez`), pictures are drawn from them, so that anybody can draw their own.
"""
