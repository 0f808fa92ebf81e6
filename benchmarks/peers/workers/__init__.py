"""Worker scripts, one per engine, launched by file path in the engine's own interpreter.

They run where specdec is not installed, so each needs the standard library, its engine and `_protocol.py` beside it,
and nothing of specdec.
"""
