# SPDX-License-Identifier: Apache-2.0
"""Measurements of speed and memory: interleaved rounds, the operator, whole networks. Imported by `sola bench` only.

A result is a dictionary for JSON with what was measured, how, on which hardware and at which commit.
"""
