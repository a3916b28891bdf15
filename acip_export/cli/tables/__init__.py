"""What commands print for people: one file per subject. Names from files are never printed as markup."""
