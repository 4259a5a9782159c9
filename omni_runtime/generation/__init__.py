"""From a model's name to pictures: loading, requests, `Omni`, results."""
