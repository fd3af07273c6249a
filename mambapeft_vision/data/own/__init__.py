"""Own images as a task: a tree of class folders, a table of paths and labels, or a data set of another library."""
