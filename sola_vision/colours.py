# SPDX-License-Identifier: Apache-2.0
"""Okabe and Ito's colours, for all pictures: distinguishable by colour-blind readers and in print. (Pages have some in
their style sheets.)
"""

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
BLACK = "#000000"
