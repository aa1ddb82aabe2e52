# SPDX-License-Identifier: Apache-2.0
"""`sola app`: a local page to drop pictures on. `subject.py` loads and asks networks, `tiles.py` prices schedules,
`guard.py` keeps other websites out, `page.py` is the page itself, the only file that knows Gradio.
"""
