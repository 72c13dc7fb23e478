"""Listens for what ends a run, as its scripts do, and says what it has heard.

python listener.py HOW [PASS]

HOW: ends "at once", or when "held" where it looks, or "raises". PASS: as the child of a launcher that passes them on.
LINE, in the environment: what it says at its end.
"""

import os
import signal
import subprocess
import sys
import time

from train.runtime.interruption import interruption


def pass_on() -> None:
    """As torchrun does with what it gets."""
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "1"}
    rank = subprocess.Popen([sys.executable, __file__, sys.argv[1]], env=environment, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: rank.send_signal(number))
    print("launcher", rank.pid, flush=True)
    sys.exit(rank.wait())


if __name__ == "__main__":
    if len(sys.argv) > 2:
        pass_on()
    how = sys.argv[1]
    interruption.listen(os.environ.get("LINE", ""))
    if how == "held":
        interruption.hold()
    elif how == "raises":
        interruption.raise_from_now("told")
    try:
        print("listening", os.getpid(), flush=True)
        while how != "held" or not interruption.told:  # what ends at once is ended by the thread that listens
            time.sleep(0.01)
        print("told", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("raised", flush=True)
