"""relaxation"""
