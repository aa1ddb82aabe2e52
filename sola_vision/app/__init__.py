# SPDX-License-Identifier: Apache-2.0
"""`sola app`: a local web page. `subject.py` loads and runs networks, `tiles.py` computes the cost of schedules,
`guard.py` rejects requests of other websites, `page.py` is the page itself and the only file that uses Gradio.
"""
