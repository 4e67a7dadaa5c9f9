"""`python -m benchmarks`: the CPU benchmarks."""

from benchmarks.bench_cpu import main

main()
