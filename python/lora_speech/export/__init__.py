"""Models as other runtimes load them: `run.export_model`, and the command `lora-speech export`.

A target (`targets/NAME.py`) writes a folder and loads it again; what it transcribes is compared
with the torch model before the folder gets its name (`run.py`, `check.py`). Targets that are graphs
share `graphs.py`, the files beside them (`folder.py`) and the loop over them
(`graph_decoding.py`).
"""
