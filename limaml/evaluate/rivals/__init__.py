"""Methods known from elsewhere that the personalised model is compared with, each as strong as we can make it."""
