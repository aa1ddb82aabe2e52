# SPDX-License-Identifier: Apache-2.0
"""The version, in its own module so that the build can read it without importing torch."""

__version__ = "0.1.0"
