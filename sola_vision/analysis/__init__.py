# SPDX-License-Identifier: Apache-2.0
"""Analysis of networks: cost, interaction range, receptive fields, feature maps, EigenCAM, attention.

Every result is available as arrays (dictionaries for `numpy.savez`), from which the figures are drawn.
"""
