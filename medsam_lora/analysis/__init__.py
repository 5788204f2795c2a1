"""What a set of scores says: means with intervals, by method and region."""
