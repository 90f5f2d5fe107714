"""Our data, scorer and models inside other evaluation frameworks. Each module imports its framework only when used."""
