"""An environment whose module starts a thread, after which no process may fork."""

import threading
import time

threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


class Threaded:
    def reset(self, **row):
        return "begin"

    def step(self, text):
        return text.upper(), 1.0, True
