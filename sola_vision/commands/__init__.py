# SPDX-License-Identifier: Apache-2.0
"""One module a verb of the command line, imported when the verb is used: `run(arguments) -> exit code or None`."""
