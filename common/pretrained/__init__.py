"""Published weights and vocabularies: the file formats, tables of names, one module for each paper.

    files.py  safetensors.py   the files in a folder        clip.py flamingo.py language.py
    names.py                   their names to ours               tables and configs
    bpe.py                     byte-level vocabularies

Nothing here imports a model. What is wrong with a file is a ValueError of one line.
"""
