from tests.gateway.live import *
async def test_a(gateway, scripted):
    for body in (ASK, STREAM, INSTANT):
        a = await ask(gateway, body)
        print(a.status, a.headers, a.body.decode()[-1500:])
