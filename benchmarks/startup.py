"""How long `import safepatch` and `safepatch --help` take, against an interpreter that does nothing.

    python benchmarks/startup.py [runs]

Every round times each command once, in turn, so that a busy moment of the machine falls on all of them alike;
"added" is the median of the differences to the bare interpreter of the same round.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

BARE = "python -c pass"
SCRIPT = Path(sys.executable).with_name("safepatch")
COMMANDS: dict[str, list[str]] = {
    BARE: [sys.executable, "-c", "pass"],
    "import safepatch": [sys.executable, "-c", "import safepatch"],
    "safepatch --help": [*([str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "safepatch"]), "--help"],
}


def seconds(command: list[str]) -> float:
    """Wall-clock time of one run; raises `CalledProcessError` when the command fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def measure(runs: int) -> dict[str, list[float]]:
    """The times of every command, round by round, after one round that warms the file cache."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(runs + 1):
        for name, command in COMMANDS.items():
            took = seconds(command)
            if turn > 0:
                times[name].append(took)
    return times


def main(runs: int) -> None:
    """Print one line per command."""
    times = measure(runs)
    print(f"{'command':<20}{'min':>9}{'median':>9}{'added':>9}   ms, {runs} runs")
    for name, values in times.items():
        added = statistics.median(mine - bare for mine, bare in zip(values, times[BARE], strict=True))
        print(f"{name:<20}{1e3 * min(values):>9.1f}{1e3 * statistics.median(values):>9.1f}{1e3 * added:>9.1f}")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)} failed:\n{error.stderr.decode()}")
