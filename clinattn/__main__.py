"""python -m clinattn."""

from clinattn.tools.cli import app

app(prog_name="clinattn")
