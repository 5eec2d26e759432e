"""Writes the probabilities of a file of predictions in 64 bit, as meds-evaluation 0.0.3 asks for.

MEDS-DEV pins that version. Later versions ask for 32 bit, which clinattn predict writes.
"""

import sys

import pyarrow as pa
import pyarrow.parquet as pq

path, name = sys.argv[1], "predicted_boolean_probability"
table = pq.read_table(path)
at = table.column_names.index(name)
pq.write_table(table.set_column(at, name, table[name].cast(pa.float64())), path)
