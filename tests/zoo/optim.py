class SGD:
    def __init__(self, layers, rate):
        self.layers, self.rate = layers, rate

    def step(self):
        for layer in self.layers:
            layer.weight -= self.rate * layer.grad
