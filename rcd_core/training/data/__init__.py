"""From files to micro-batches.

prepare's Parquet files   examples.py      reads examples chunk by chunk and masks them (rcd_core/noise.py)
or the signal cache       signal_cache.py  reads rows whose masks and signals were stored (signal_format.py)
-> TrainingRow            rows.py          one row, and the order of rows that both sources follow
-> MicroBatch             batches.py       packs, pads and prefetches each rank's rows of a step
"""
