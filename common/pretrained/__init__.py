"""Published weights and vocabularies. Nothing here imports a model; mistakes are one line."""
