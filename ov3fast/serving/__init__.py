"""A model behind HTTP: `ov3fast serve`.

    server.py     uvicorn: address, time limits, drain
    app.py        endpoints and their responses
    service.py    a request's path: admit, receive, decode, queue, answer or refuse
    intake.py     request bodies to images and texts, within limits
    answers.py    results to JSON, .npy, .safetensors, PNG
    batching.py   one thread for the model, with dynamic batching
    jobs.py       the model's calls, with the same bits in any batch
    options.py    limits; metrics.py: Prometheus metrics; errors.py: refusals

Needs the extra `serve`.
"""
