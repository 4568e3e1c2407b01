"""knapsack"""
