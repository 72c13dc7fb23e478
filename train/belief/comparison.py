def report(plan, runs):
    print("REPORT", runs)
