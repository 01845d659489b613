"""Files of ours: private ones, ones that are held on to while they are used."""
