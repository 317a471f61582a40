"""stub"""
def write_remote_code(plan, partial, make):
    pass
