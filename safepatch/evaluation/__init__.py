"""What a patch does, measured: a bench that draws, metrics with intervals, and the matrix whose cells give rows."""
