"""Devices behind a remote shell: what adb and ssh have in common.

`shell` runs scripts there, `store` keeps files there by content, `lock` lets one user in at a time, `workplace` runs a
program there, `probes` asks the device about itself, `transport` puts them together.
"""
