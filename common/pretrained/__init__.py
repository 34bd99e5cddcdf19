"""Reading published weights: files of tensors, tables of names, one module for each paper.

    safetensors.py   the format, bounds-checked          names.py   their names to ours
    files.py         what lies in a folder               clip.py    CLIP's tables and configs

Nothing here imports a model. Nothing that is read is trusted: what is wrong with a file is one
ValueError of one line.
"""
