def supports(problem):
  return "not yet"
forward = cotangent = None
