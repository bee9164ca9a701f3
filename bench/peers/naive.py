"""The usual snippet (docs/tour.md), fixed only as far as it needs to answer; on gunicorn's default worker."""

import os

import joblib
from flask import Flask, jsonify, request

app = Flask(__name__)
model = joblib.load(os.environ["MODEL_PATH"])


@app.route("/predict", methods=["POST"])
def predict():
    data = request.json["data"]
    prediction = model.predict(data)
    return jsonify({"prediction": prediction.tolist()})
