"""Parts of benchmarks/gpu_suite.py, one idea a file."""
