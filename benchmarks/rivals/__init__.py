"""What ``make bench-rivals`` runs: our exports against other tools' at equal bytes, each in its own runtime."""
