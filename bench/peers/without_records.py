"""An extension that records no request, for bench.cost. What else looks at requests, such as metrics, stays."""


def init_app(app, service):
    service.observers.remove(service.request_log.observe)
