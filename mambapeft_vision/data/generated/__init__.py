"""Task folders that are drawn or made from data sets that other packages carry."""
