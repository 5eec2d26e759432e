"""python -m clinattn."""

from clinattn.cli import app

app(prog_name="clinattn")
