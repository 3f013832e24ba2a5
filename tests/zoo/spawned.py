"""A process that multiprocessing spawns."""

import multiprocessing

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=print, args=("anything",))
    worker.start()
    worker.join()
