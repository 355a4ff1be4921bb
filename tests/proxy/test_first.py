from tests.fakes.engine import FakeEngine
from tests.proxy.fleet import Fleet

def test_it(fleet: Fleet, pair: tuple[FakeEngine, FakeEngine]) -> None:
    r = fleet.chat()
    print(r.text, r.headers)
    print(fleet.record(r))
    r = fleet.chat(stream=True)
    print(r.text, r.headers)
    print(fleet.record(r))
    print(pair[0].received, pair[1].received)
    print(fleet.client.get("/metrics").text)
    print(fleet.client.get("/nope").text, fleet.client.get("/v1/completions").text)
