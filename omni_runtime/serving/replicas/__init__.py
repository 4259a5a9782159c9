"""Several replicas of one application, behind a front that sends a request again if its replica dies."""
