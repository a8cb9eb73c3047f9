"""A server that speaks the part of the Hub's HTTP interface which the package uses, for tests without a network."""
