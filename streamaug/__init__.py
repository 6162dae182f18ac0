"""train on a stream"""
