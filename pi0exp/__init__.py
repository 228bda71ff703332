"""Which optimization stack runs the Pi0 robot policy fastest, what does each part bring, are the actions the same?"""
