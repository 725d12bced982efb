import threading
import time
from contextlib import contextmanager, nullcontext

from cosmos_mcore.tokenizer import cuda_graph


def test_captures_exclude_each_other_and_marked_work(monkeypatch):
    capturing, working = [], []

    @contextmanager
    def graph(*arguments, **options):
        capturing.append(1)
        assert len(capturing) == 1 and not working
        time.sleep(0.005)
        yield
        assert len(capturing) == 1 and not working
        capturing.pop()

    monkeypatch.setattr(cuda_graph.torch.cuda, "graph", graph)
    errors = []

    def capture():
        with cuda_graph.capture(None):
            pass

    def work():
        with cuda_graph.no_capture():
            working.append(1)
            assert not capturing
            time.sleep(0.002)
            working.pop()

    def run(function):
        try:
            for _ in range(10):
                function()
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[function]) for function in (capture, capture, work, work, work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors and not any(thread.is_alive() for thread in threads)


def test_work_that_hangs_does_not_stop_captures(monkeypatch):
    monkeypatch.setattr(cuda_graph.torch.cuda, "graph", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(cuda_graph, "_PATIENCE", 0.05)

    def capture():
        with cuda_graph.capture(None):
            pass

    with cuda_graph.no_capture():
        thread = threading.Thread(target=capture)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
