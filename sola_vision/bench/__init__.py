# SPDX-License-Identifier: Apache-2.0
"""Measuring speed and memory: interleaved rounds, the operator, whole networks. Imported by `sola bench` alone.

A result is a dictionary for JSON that says what was measured, how, on which hardware, at which commit.
"""
